"""The model room: rope, attention (MLA), router, balance, moe, mtp, loss, transformer."""
