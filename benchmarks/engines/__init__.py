"""Engines that read a whole network from files, shared by the problems that have one.

`folder` is what a problem's `export` wrote: inputs.npz (arrays by input name), model.onnx, and model-old.onnx for
engines that read nothing newer than opset 14.
"""
