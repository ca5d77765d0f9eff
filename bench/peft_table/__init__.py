"""LoSiA's entries for the MetaMathQA table of PEFT's method comparison, and what runs them there."""
