"""Does it learn better? A small study on real data: FFT, LoRA, DoRA, PiSSA, GaLore and LoSiA on SmolLM2-135M.

``python -m bench quality`` runs what has not been run, ``python -m bench quality-report`` writes README.md."""
