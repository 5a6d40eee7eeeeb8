"""Charts, figures and contours, for pages, reports, experiments and benchmarks."""
