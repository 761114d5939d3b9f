"""Speed, memory and accuracy, measured against what people would use instead.

A package, so that `python -m benchmarks` and `pytest benchmarks/` import the same modules and no
installed package of that name can shadow them. It is not part of the wheel.
"""
