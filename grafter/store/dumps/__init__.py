"""Dumps: chosen points on disk, written while the run continues, and read back without trust.

record            what is known of one dumped point: the schema of the files, and metadata as JSON

Writing, from a point to the disk:

rank_dumps        one rank's dumps; also the run that only dumps, without another job
limits            which steps, how many bytes, how many points
saver             takes a point at the call and hands it to the writer
pending_record    one point that waits for the disk
snapshot          the copy of a tensor, and the buffers for these copies
writer            safetensors files, renamed when they are complete, and the bounded queue of writes
termination       SIGTERM: the dumps are written first, then the process ends

Reading, from the directory to a tensor:

directory         finds the role's directory, and reads every record in it
record_file       opens the files below it, and checks their records
reader            `open_dumps`: points merged over ranks, in execution order; a table of them
point             one point: each rank's record and tensor, and the whole tensor
tensor_file       one safetensors file, checked to the byte and mapped
pieces            all ranks' layouts -> which part of the whole tensor each of them holds
lazy_tensor       the whole tensor, read box by box
"""
