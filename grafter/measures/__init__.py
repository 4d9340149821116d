"""Measures: what a tensor is like, and how far two are apart, as docs/differences.md defines it.

flat_chunks  the flattened index cut into fixed chunks, so that no digit depends on strides or threads
chunk_pass   the tensors, chunk by chunk, in bounded memory
chunk_sums   the sums of one chunk
stats        chunks combined into statistics and differences
"""
