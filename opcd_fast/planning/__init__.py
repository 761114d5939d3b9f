"""How much memory a run will need, from its settings and the models' configurations alone.

The step that will be run is rehearsed: the same code, models and optimizer, on tensors that have shapes and no data
(torch's FakeTensorMode), while every storage that comes and goes is counted. What a kernel takes inside of itself is
not seen by that and is counted from the same plan that the kernel follows (`loss_scratch`, `gpu_attention`).
"""
