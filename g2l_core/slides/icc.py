"""Colors as the scanner meant them: pixels converted to sRGB by the ICC profile that their file carries.

Little CMS does it, as Pillow has it, with the rendering intent that the profile asks for.
"""

from functools import lru_cache
from io import BytesIO

import numpy as np
import openslide
from PIL import Image, ImageCms

from g2l_core.errors import NotASlideError, ReadError
from g2l_core.slides.notes import Note
from g2l_core.types import Rgb

NO_PROFILE = "without an ICC profile: colors stay as they are"
"""The note about a slide or an image whose colors --icc cannot convert."""

TIFF_TAG = 34675
"""The tag InterColorProfile (TIFF 6.0's registry; ICC.1, annex B.4)."""

_SPACE = "RGB"


class ToSrgb:
    """A conversion of uint8 RGB to sRGB. Safe in several threads."""

    def __init__(self, profile: bytes) -> None:
        """Make the conversion.

        Args:
            profile: The ICC profile, as a file has it.

        Raises:
            ReadError: The profile is damaged, or not of RGB.
        """
        try:
            opened = ImageCms.getOpenProfile(BytesIO(profile))
            space = opened.profile.xcolor_space.strip()
            if space != _SPACE:
                raise ReadError(f"its ICC profile is for {space} and not for RGB: convert it, or leave --icc out")
            intent = ImageCms.Intent(ImageCms.getDefaultIntent(opened))
            srgb = ImageCms.createProfile("sRGB")
            self._transform = ImageCms.buildTransform(opened, srgb, _SPACE, _SPACE, intent)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            raise ReadError(
                f"its ICC profile of {len(profile):,} bytes cannot be used ({error}): convert it again, or leave --icc "
                "out"
            ) from error

    def __call__(self, pixels: Rgb) -> Rgb:
        """The pixels in sRGB; those given stay as they are."""
        image = Image.fromarray(np.ascontiguousarray(pixels))
        converted = ImageCms.applyTransform(image, self._transform)
        assert converted is not None  # it is None only if the image was changed in place
        return np.array(converted)


@lru_cache(maxsize=16)
def to_srgb(profile: bytes) -> ToSrgb:
    """The conversion by a profile. Images of a set share one.

    Raises:
        ReadError: The profile is damaged, or not of RGB.
    """
    return ToSrgb(profile)


def slide_to_srgb(handle: object) -> ToSrgb | None:
    """The conversion by a slide's profile; None where the slide has none.

    Args:
        handle: The open slide: OpenSlide's, or any with its property `color_profile`, an `ImageCms` profile or None.

    Raises:
        NotASlideError: The profile is damaged, or not of RGB.
    """
    try:
        profile = getattr(handle, "color_profile", None)
        return None if profile is None else to_srgb(profile.tobytes())
    except ReadError as error:
        raise NotASlideError(str(error)) from error
    except (ImageCms.PyCMSError, openslide.OpenSlideError, OSError, ValueError) as error:
        raise NotASlideError(
            f"its ICC profile cannot be read ({error}): convert it again, or leave --icc out"
        ) from error


def profile_notes(conversion: ToSrgb | None) -> tuple[Note, ...]:
    """The note about a slide whose colors cannot be converted."""
    return () if conversion else (Note(text=NO_PROFILE),)
