"""Dumps: a run's memory. Chosen points on disk, written beside the run and read back without trust.

record      what is known of one dumped point: the schema of the files

Writing, from a point to the disk:

choice           which points are saved (limits: how many of them)
rank_dumps       one rank's dumps as its points see them; alone: a run that only dumps, without another job
saver            a point as it is at the call (taken): snapshot (buffers) and metadata (encoding)
backlog          what is not on disk yet, bounded in bytes, worked off by one thread
writer           the files: safetensors, renamed when they are whole; one line a point
termination      SIGTERM: first to disk, then what would have happened

Reading, from the directory to a tensor:

directory        which one is meant, which ranks wrote there, every record that can be read (record_file), problems
reader           `open_dumps`: points merged over ranks by key, in execution_order; table
point            one point: each rank's record and tensor, and the whole tensor
tensor_file      one safetensors file, checked to the byte and mapped (safe_open: nothing outside of the directory)
pieces           all ranks' layouts -> which part of the whole tensor each holds
lazy_tensor      the whole tensor, read box by box (readahead: the next one from the disk meanwhile)
"""
