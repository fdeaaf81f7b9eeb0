"""The hot loops of attn_lab: programmable attention and gated linear recurrences."""
