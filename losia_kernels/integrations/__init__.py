"""LoSiA in the libraries people train with; each imports its library on its own.

transformers: the callback for every Trainer; of it arguments (the optimizer that the Trainer's
arguments ask for), aside (training steps on the side: calibration, how the loss is scaled),
following (reference models) and history (the records of a run). peft: the method for PEFT.
"""
