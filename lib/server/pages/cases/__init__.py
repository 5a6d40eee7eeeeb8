"""The page of a case: its slices, its versions, and clicks on them."""
