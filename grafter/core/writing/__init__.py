"""Writes an incoming value to the target's tensor, by the rules of shape, dtype, memory and autograd.

write_back     the write modes, and what each refuses
conversion     which dtypes may be converted, and how many values saturate
tensor_access  the memory below a tensor subclass
"""
