"""Everything to run on the day a CUDA device is at hand (`make gpu-check`): in order of worth, each part in a process
of its own, written down as soon as it is found.

`works.py` is the list of the parts, one module each; `runner.py` runs them; `alone.py` and `wheels.py` are for a
machine without a network. The rehearsal, on a device made of CPU memory, is `tests/device/test_gpu_check.py`.
"""
