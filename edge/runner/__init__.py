"""The runner of an artifact, in parts; :mod:`contlearn.edge.runtime` joins them into the one file for a device.

These modules import NumPy, ONNX Runtime, the standard library and each other, nothing else.
"""
