"""NVIDIA GPUs.

* reader: GpuReader: asks NVML in a child that may hang
* nvml: that child
* facts: what is told of a GPU
* devices: device nodes, and how they are made
* job_view: what a job sees of a card
"""
