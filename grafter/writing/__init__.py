"""Writing: an incoming value into the target's tensor, by the rules of shape, dtype, memory and autograd.

write_back     the modes, and what each refuses
conversion     what may become what, and how many values saturate
tensor_access  the memory below a tensor subclass
"""
