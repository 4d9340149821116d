"""Measures: what a tensor is like, and how far two are apart, as `stats` (and, for `grafter compare`, docs/compare.md)
defines it.

flat_chunks  the flattened index cut into fixed chunks, so that no digit depends on strides or threads
chunk_pass   the tensors, chunk by chunk, in bounded memory
chunk_sums   the sums of one chunk
stats        chunks combined into statistics and differences

Of two dumps more is asked, and they come block by block:

pair_stream  blocks cut into the same chunks, each measured once, by this thread or by one that is free
pair_chunks  what is measured of a few chunks at a time
magnitudes   how large the differences are: a histogram, and percentiles from it
ulps         how many representable numbers lie between
rows         the worst token
kl           how far two distributions of logits are apart
"""
