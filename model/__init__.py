"""The student, its teacher, and what is done to them: distill, quantize, export as plans."""
