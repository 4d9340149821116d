"""Capture: points of a running program that nobody wrote into it.

selection      which modules: patterns over path and class
naming         a module's path -> the name and tags that both jobs share
containers     a module's inputs and outputs -> their tensors, by path, and back
attachment     hooks on the selected modules of one model; `grafter.attach` makes one
parameters     `grafter.dump_model`: weights and buffers as points
"""
