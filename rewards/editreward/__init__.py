"""EditReward: a Qwen2.5-VL regressor that scores an edit from source, result and instruction. Imports nothing heavy."""
