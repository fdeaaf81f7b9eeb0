import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.data import augment


@pytest.fixture(scope="module")
def images():
    pixels = jax.random.randint(jax.random.key(0), (16, 12, 12, 3), 0, 256).astype(jnp.uint8)
    return augment.to_unit(pixels)


def keys(count):
    return jax.random.split(jax.random.key(7), count)


def test_units(images):
    assert images.dtype == jnp.float32 and images.min() == 0 and images.max() == 1
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    scaled = augment.normalize(images, mean, std)
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["random_flip", "random_crop", "random_resized_crop", "rand"])
def test_a_function_of_the_key_and_of_the_example(images, name):
    apply = {
        "random_flip": augment.random_flip,
        "random_crop": lambda key, x: augment.random_crop(key, x, 3),
        "random_resized_crop": augment.random_resized_crop,
        "rand": augment.rand_augment,
    }[name]
    one, two = keys(2)
    first = apply(one, images)
    assert first.shape == images.shape and first.dtype == images.dtype
    assert first.min() >= 0 and first.max() <= 1 + 1e-5
    np.testing.assert_array_equal(first, apply(one, images))
    assert (first != apply(two, images)).any()
    copies = apply(one, jnp.broadcast_to(images[:1], images.shape))
    assert len(np.unique(np.asarray(copies).reshape(len(copies), -1), axis=0)) > 1


def test_half_of_the_images_are_mirrored(images):
    many = jnp.tile(images, (50, 1, 1, 1))
    flipped = augment.random_flip(keys(1)[0], many)
    mirrored = (flipped == many[:, :, ::-1]).all((1, 2, 3))
    same = (flipped == many).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(many))


def test_crops_are_shifts_and_every_shift_comes(images):
    padding, copies = 2, 500
    same = jnp.broadcast_to(images[:1], (copies, *images.shape[1:]))
    cropped = augment.random_crop(keys(1)[0], same, padding)
    padded = np.pad(images[0], ((padding, padding), (padding, padding), (0, 0)))
    shifts = {padded[y : y + 12, x : x + 12].tobytes(): (y, x) for y in range(5) for x in range(5)}
    assert {shifts[np.asarray(x).tobytes()] for x in cropped} == set(shifts.values())


def test_resized_crops_of_a_ramp_have_the_sides_asked_for():
    """On a linear ramp, the slope of the crop is its side and the middle its place."""
    size, copies = 64, 300
    ramp = (jnp.arange(size) + 0.5) / size
    image = jnp.stack(jnp.meshgrid(ramp, ramp, indexing="ij"), -1)
    crops = augment.random_resized_crop(
        keys(1)[0], jnp.broadcast_to(image, (copies, *image.shape)), (0.2, 0.6), (0.5, 2.0)
    )
    middle = crops[:, 16:48, 16:48]
    height = np.asarray(middle[:, -1, 0, 0] - middle[:, 0, 0, 0]) / 31 * size
    width = np.asarray(middle[:, 0, -1, 1] - middle[:, 0, 0, 1]) / 31 * size
    area, uncut = height * width, (height < 0.99) & (width < 0.99)
    ratio = (width / height)[uncut]
    area = area[uncut]
    assert 0.199 < area.min() < 0.22 and 0.55 < area.max() < 0.601
    assert 0.499 < ratio.min() < 0.55 and 1.8 < ratio.max() < 2.001
    centre = np.asarray(middle.mean((1, 2)))
    assert (centre[:, 0] - height / 2 > -1e-3).all() and (centre[:, 0] + height / 2 < 1.001).all()
    assert (centre[:, 1] - width / 2 > -1e-3).all() and (centre[:, 1] + width / 2 < 1.001).all()


def test_a_crop_of_everything_changes_nothing(images):
    same = augment.random_resized_crop(keys(1)[0], images, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_allclose(same, images, atol=1e-6)


def two_tone(size=8, side=16):
    """Black images of class 0 in front, white ones of class 1 behind, so that partners differ."""
    label = jnp.repeat(jnp.arange(2), size // 2)
    image = jnp.broadcast_to(label[:, None, None, None], (size, side, side, 1)).astype(jnp.float32)
    return image, jax.nn.one_hot(label, 2)


def test_mixup_mixes_images_and_labels_alike():
    image, label = two_tone()
    mix = jax.jit(lambda key: augment.mixup_cutmix(key, image, label, cutmix=0.0))
    lams = []
    for key in keys(40):
        mixed, labels = mix(key)
        np.testing.assert_allclose(mixed[:, 0, 0, 0], labels[:, 1], atol=1e-6)
        assert len(np.unique(mixed[0])) == 1
        np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
        lams.append(float(labels[0, 0]))
    assert min(lams) < 0.2 and max(lams) > 0.8


def test_cutmix_takes_a_box_and_counts_its_pixels():
    image, label = two_tone()
    mix = jax.jit(lambda key: augment.mixup_cutmix(key, image, label, mixup=0.0))
    boxes = set()
    for key in keys(40):
        mixed, labels = mix(key)
        assert set(np.unique(mixed)) <= {0.0, 1.0}
        np.testing.assert_allclose(mixed.mean((1, 2, 3)), labels[:, 1], atol=1e-6)
        rows, columns, _ = np.nonzero(np.asarray(mixed[0]))
        area = len(set(rows)) * len(set(columns))
        assert area == mixed[0].sum()
        boxes.add((min(rows, default=0), min(columns, default=0), area))
    assert len(boxes) > 20


def test_mixup_or_cutmix_or_nothing():
    image, label = two_tone()
    mix = jax.jit(lambda key, on: augment.mixup_cutmix(key, image, label, active=on))
    cut = [set(np.unique(mix(key, True)[0])) <= {0.0, 1.0} for key in keys(60)]
    assert abs(np.mean(cut) - 0.5) < 5 * 0.5 / np.sqrt(60)
    for out, given in zip(mix(keys(1)[0], False), (image, label)):
        np.testing.assert_array_equal(out, given)
    for out, given in zip(
        augment.mixup_cutmix(keys(1)[0], image, label, mixup=0.0, cutmix=0.0), (image, label)
    ):
        np.testing.assert_array_equal(out, given)


def apply(name, image, strength=0.9, sign=1.0, fill=(0.5,)):
    return augment.OPERATIONS[name](image, strength, sign, jnp.array(fill))


@pytest.mark.parametrize(
    "name",
    "rotate shear_x shear_y translate_x translate_y color contrast brightness sharpness solarize "
    "solarize_add".split(),
)
def test_without_strength_nothing_happens(images, name):
    image = 0.98 * images[0]
    np.testing.assert_allclose(apply(name, image, 0.0), image, atol=1e-5)
    assert abs(apply(name, image) - image).max() > 0.05


@pytest.mark.parametrize("name", list(augment.OPERATIONS))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_operations_stay_in_range_on_any_image(images, name, sign):
    for image in images[0], images[0, :, :, :1], jnp.zeros((12, 10, 3)), jnp.full((9, 9, 1), 0.3):
        out = apply(name, image, sign=sign)
        assert out.shape == image.shape
        assert jnp.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometry_keeps_a_constant_image_of_the_fill_colour(name):
    flat = jnp.full((10, 14, 3), 0.25)
    np.testing.assert_allclose(apply(name, flat, fill=(0.25,) * 3), flat, atol=1e-6)
    edge = apply(name, flat, fill=(0.0, 0.5, 1.0))
    assert (abs(edge - flat).max((0, 1)) > 0.2).all()


def test_pillow_agrees():
    """Operations without interpolation against Pillow's, to the rounding of 8 bits."""
    image_ops = pytest.importorskip("PIL.ImageOps")
    from PIL import Image, ImageEnhance

    pixels = np.random.default_rng(0).normal(100, 50, (32, 32, 3)).clip(0, 230).astype(np.uint8)
    image, picture = augment.to_unit(pixels), Image.fromarray(pixels)
    want = {
        "auto_contrast": image_ops.autocontrast(picture),
        "equalize": image_ops.equalize(picture),
        "invert": image_ops.invert(picture),
        "posterize": image_ops.posterize(picture, 1),
        "solarize": image_ops.solarize(picture, 256 - 230),
        "color": ImageEnhance.Color(picture).enhance(1.81),
        "contrast": ImageEnhance.Contrast(picture).enhance(1.81),
        "brightness": ImageEnhance.Brightness(picture).enhance(1.81),
        "sharpness": ImageEnhance.Sharpness(picture).enhance(1.81),
    }
    for name, expected in want.items():
        got = 255 * np.asarray(apply(name, image))
        expected = np.asarray(expected, np.float32)
        if name == "sharpness":  # Pillow leaves the rim alone
            got, expected = got[1:-1, 1:-1], expected[1:-1, 1:-1]
        assert abs(got - expected).max() < 1.5, name


def test_directions(images):
    """Translation by 0.45 of the side, and a rotation that turns a bar."""
    image = jnp.zeros((20, 20, 1)).at[:, 10].set(1)
    moved = apply("translate_x", image, 1.0, 1.0, (0.0,))
    np.testing.assert_allclose(moved[:, 1, 0], 1, atol=1e-5)
    np.testing.assert_array_equal(apply("translate_y", image, 1.0, 1.0, (0.0,))[:11], image[:11])
    assert abs(apply("shear_x", image, 1.0)[0] - image[0]).max() > 0.5
    np.testing.assert_allclose(apply("shear_y", image, 1.0, 1.0, (0.0,))[4:16], image[4:16])


def test_rand_augment_applies_as_often_as_asked(images):
    many = jnp.tile(0.9 * images, (40, 1, 1, 1))
    assert (augment.rand_augment(keys(1)[0], many, probability=0.0) == many).all()
    once = augment.rand_augment(keys(1)[0], many, num_ops=1, probability=0.5)
    changed = (once != many).any((1, 2, 3)).mean()
    assert abs(changed - 0.5) < 5 * 0.5 / np.sqrt(len(many))
