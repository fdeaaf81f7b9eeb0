"""Mechanisms as pure functions: arrays in, arrays out."""

from attn_lab.ops.attention import *
from attn_lab.ops.biases import *
from attn_lab.ops.convolution import *
from attn_lab.ops.decays import *
from attn_lab.ops.differential import *
from attn_lab.ops.eviction import *
from attn_lab.ops.grids import *
from attn_lab.ops.heads import *
from attn_lab.ops.latent import *
from attn_lab.ops.lean import *
from attn_lab.ops.linear import *
from attn_lab.ops.linear_weights import *
from attn_lab.ops.local import *
from attn_lab.ops.masks import *
from attn_lab.ops.normalizers import *
from attn_lab.ops.normed import *
from attn_lab.ops.pairs import *
from attn_lab.ops.patterns import *
from attn_lab.ops.positions import *
from attn_lab.ops.relations import *
from attn_lab.ops.scores import *
from attn_lab.ops.selection import *
from attn_lab.ops.vision import *
