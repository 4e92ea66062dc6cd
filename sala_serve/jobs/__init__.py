"""Work that outlives the request that asked for it: stored responses, background jobs, files, batches."""
