"""Augmentation of image batches on the device: pure, jit-able, one random key per example.

Images are float32 `[B, Y, X, C]` in `[0, 1]` (`to_unit`), `normalize` comes last.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 images as float32 in `[0, 1]`."""
    return images.astype(jnp.float32) / 255


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """`(images - mean) / std` with mean and std `[C]` of images in `[0, 1]`."""
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors every image left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Shifts every image by up to `padding` pixels along both axes; what comes in is 0."""

    def crop(key, image):
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (y, x, 0), image.shape)

    return _each(crop, key, images)


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    scale: tuple[float, float] = (0.8, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """A random rectangle of every image, resized to the whole image by linear interpolation.

    The area is a uniform fraction of the image within `scale`, width over height is log-uniform
    within `ratio`; sides longer than the image's are cut to it.

    Source: Szegedy et al., 2014, arXiv 1409.4842.
    """

    def crop(key, image):
        for_area, for_ratio, for_place = jax.random.split(key, 3)
        area = jax.random.uniform(for_area, minval=scale[0], maxval=scale[1])
        log_ratio = jnp.log(jnp.array(ratio))
        root = jnp.exp(jax.random.uniform(for_ratio, minval=log_ratio[0], maxval=log_ratio[1]) / 2)
        sides = jnp.minimum(jnp.sqrt(area) * jnp.stack([1 / root, root]), 1)
        corner = jax.random.uniform(for_place, (2,)) * (1 - sides)
        size = jnp.array(image.shape[:2], jnp.float32)
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), 1 / sides, -corner * size / sides, "linear", antialias=False
        )

    return _each(crop, key, images)


def mixup_cutmix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    active: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes the batch with itself in reverse order, by mixup or by cutmix, one draw per batch.

    Mixup: `lam x + (1 - lam) x'` with `lam ~ Beta(mixup, mixup)`. Cutmix: a rectangle at a uniform
    place with about `1 - lam` of the area, `lam ~ Beta(cutmix, cutmix)`, comes from x'; lam is then
    the area that remains. Labels are mixed by lam.

    Args:
      key: random key.
      images: `[B, Y, X, C]`.
      labels: probabilities of the classes `[B, classes]`.
      mixup, cutmix: of the Beta laws; 0 turns that one off.
      switch: probability of cutmix when both are on.
      active: False leaves the batch as it is; may be traced.

    Returns:
      images and labels of the shapes given.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz, 2017, arXiv 1710.09412; Yun et al., 2019,
    arXiv 1905.04899.
    """
    if not mixup and not cutmix:
        return images, labels
    for_choice, for_lam, for_place = jax.random.split(key, 3)
    share = switch if mixup and cutmix else float(cutmix > 0)
    cut = jax.random.bernoulli(for_choice, share)
    alpha = jnp.where(cut, cutmix, mixup)
    lam = jnp.where(active, jax.random.beta(for_lam, alpha, alpha), 1.0)
    height, width = images.shape[1:3]
    size = jnp.array([height, width])
    centre = jax.random.uniform(for_place, (2,)) * size
    half = jnp.sqrt(1 - lam) * size / 2
    low, high = jnp.round(jnp.clip(jnp.stack([centre - half, centre + half]), 0, size))
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    box = (low[0] <= rows) & (rows < high[0]) & (low[1] <= columns) & (columns < high[1])
    keep = jnp.where(cut, 1.0 - box, lam)
    lam = jnp.where(cut, 1.0 - box.mean(), lam)
    keep = keep[:, :, None]
    return keep * images + (1 - keep) * images[::-1], lam * labels + (1 - lam) * labels[::-1]


def rand_augment(
    key: jax.Array,
    images: jax.Array,
    *,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    num_ops: int = 2,
    probability: float = 0.5,
    fill: Sequence[float] = (0.5,),
) -> jax.Array:
    """Applies `num_ops` operations, drawn uniformly from `OPERATIONS`, to every image.

    Each happens with the given probability, with a strength `m / 10` where
    `m ~ N(magnitude, magnitude_std^2)` cut to `[0, 10]`, and, where it has a direction, in a random
    one. All fifteen operations of the usual "increasing" set are there: geometry by linear
    interpolation, colour in float32 without rounding to 1/255.

    Args:
      key: random key.
      images: `[B, Y, X, C]` in `[0, 1]`, one channel or three.
      magnitude, magnitude_std, num_ops, probability: as above ("rand-m9-mstd0.5-inc1").
      fill: colour `[C]` behind the edge of the image.

    Returns:
      `[B, Y, X, C]` in `[0, 1]`.

    Source: Cubuk, Zoph, Shlens, Le, 2019, arXiv 1909.13719.
    """
    fill = jnp.asarray(fill, images.dtype)

    def augment(key, image):
        for op_key in jax.random.split(key, num_ops):
            for_op, for_skip, for_strength, for_sign = jax.random.split(op_key, 4)
            m = magnitude + magnitude_std * jax.random.normal(for_strength)
            sign = jax.random.rademacher(for_sign, (), images.dtype)
            new = jax.lax.switch(
                jax.random.randint(for_op, (), 0, len(OPERATIONS)),
                list(OPERATIONS.values()),
                *(image, jnp.clip(m, 0, 10) / 10, sign, fill),
            )
            image = jnp.where(jax.random.bernoulli(for_skip, probability), new, image)
        return image

    return _each(augment, key, images)


def _each(function, key, images):
    return jax.vmap(function)(jax.random.split(key, len(images)), images)


# The operations take an image [Y, X, C], a strength in [0, 1], a sign and the fill colour.


def _affine(matrix: Callable, shift: Callable) -> Callable:
    """The image seen through `output position -> matrix @ position + shift`, about its centre."""

    def apply(image, strength, sign, fill):
        size = jnp.array(image.shape[:2], image.dtype)
        centre = (size - 1) / 2
        grid = jnp.stack(jnp.mgrid[: image.shape[0], : image.shape[1]], -1) - centre
        amount = strength * sign
        source = grid @ matrix(amount).T + shift(amount) * size + centre
        inside = jnp.pad(image - fill, ((1, 1), (1, 1), (0, 0)))

        def sample(channel):
            return jax.scipy.ndimage.map_coordinates(
                channel, list(jnp.moveaxis(source + 1, -1, 0)), order=1, mode="constant"
            )

        return jax.vmap(sample, -1, -1)(inside) + fill

    return apply


def _linear(matrix):
    return _affine(matrix, lambda _: jnp.zeros(2))


def _rotation(amount):
    angle = jnp.deg2rad(30) * amount
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[c, -s], [s, c]])


def _translation(axis):
    return _affine(lambda _: jnp.eye(2), lambda amount: 0.45 * amount * jnp.eye(2)[axis])


def _blend(degenerate: Callable) -> Callable:
    """`d + (1 +- 0.9 strength) (image - d)` for a degenerate image d."""

    def apply(image, strength, sign, fill):
        other = degenerate(image)
        return jnp.clip(other + (1 + 0.9 * strength * sign) * (image - other), 0, 1)

    return apply


def _gray(image):
    if image.shape[-1] == 1:
        return image
    return (image @ jnp.array([0.299, 0.587, 0.114], image.dtype))[..., None]


def _smooth(image):
    kernel = jnp.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], image.dtype) / 13
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return jax.vmap(lambda x: jax.scipy.signal.convolve2d(x, kernel, "valid"), -1, -1)(padded)


def _auto_contrast(image, strength, sign, fill):
    low, high = image.min((0, 1)), image.max((0, 1))
    spread = high - low
    return jnp.where(spread > 0, (image - low) / jnp.where(spread > 0, spread, 1), image)


def _equalize(image, strength, sign, fill):
    def channel(x):
        levels = jnp.round(255 * x)
        ranks = jnp.sort(levels.ravel())
        below = jnp.searchsorted(ranks, levels.ravel()).reshape(x.shape)
        # In whole pixels, as image libraries count: it shows on small images.
        step = jnp.searchsorted(ranks, ranks[-1]) // 255
        equal = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255) / 255
        return jnp.where(step > 0, equal, x).astype(x.dtype)

    return jax.vmap(channel, -1, -1)(image)


def _invert(image, strength, sign, fill):
    return 1 - image


def _posterize(image, strength, sign, fill):
    step = 2.0 ** (4 + jnp.floor(4 * strength))
    return jnp.floor(jnp.round(255 * image) / step) * step / 255


def _solarize(image, strength, sign, fill):
    return jnp.where(image < 1 - strength, image, 1 - image)


def _solarize_add(image, strength, sign, fill):
    return jnp.where(image < 0.5, jnp.minimum(image + 110 / 255 * strength, 1), image)


OPERATIONS: dict[str, Callable] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _linear(_rotation),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _blend(_gray),
    "contrast": _blend(lambda image: _gray(image).mean()),
    "brightness": _blend(jnp.zeros_like),
    "sharpness": _blend(_smooth),
    "shear_x": _linear(lambda amount: jnp.array([[1, 0], [0.3 * amount, 1]])),
    "shear_y": _linear(lambda amount: jnp.array([[1, 0.3 * amount], [0, 1]])),
    "translate_x": _translation(1),
    "translate_y": _translation(0),
}
