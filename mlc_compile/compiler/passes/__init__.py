"""The compiler's own passes, one file each; compiler/pipeline.py gives their order."""
