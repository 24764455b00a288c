"""Peaks that MFU is measured on: dense bfloat16, by the makers' data sheets."""

PEAK_TFLOPS = {"a100": 312.0, "h100": 989.0, "h200": 989.0}
