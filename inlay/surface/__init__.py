"""PEFT's names: `get_peft_model`, `PeftModel`, the Auto classes and the functions."""
