"""Training loss of a mask: language-modelling and distillation losses, sparsity budget, and further terms."""
