"""The honest comparison of optimizers: tuned alike, run anew with fresh seeds, judged with its uncertainty."""
