"""Work that outlasts a request: jobs, the queue, prefetching, scoring and retraining."""
