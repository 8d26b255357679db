"""Training that keeps zeros: a guard for anybody's training loop, and Tawny's own masked distillation."""
