"""NVIDIA GPUs.

* reader: GpuReader: asks NVML in a child process, which may hang
* nvml: the child process
* facts: GpuFact: the description of a GPU for the node's processes
* devices: device nodes and their creation
* job_view: the part of a card that a job sees
"""
