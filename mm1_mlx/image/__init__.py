"""Pictures as files, bytes or Pillow images -> normalised tiles [H, W, 3]. No mlx."""

from mm1_mlx.image.decoding import decode as decode
from mm1_mlx.image.decoding import encoded as encoded
from mm1_mlx.image.decoding import upright as upright
from mm1_mlx.image.decoding import with_alpha as with_alpha
from mm1_mlx.image.guard import DECODERS as DECODERS
from mm1_mlx.image.guard import pillow_guard as pillow_guard
from mm1_mlx.image.loading import Seen as Seen
from mm1_mlx.image.loading import load_picture as load_picture
from mm1_mlx.image.loading import load_pictures as load_pictures
from mm1_mlx.image.opening import open_picture as open_picture
from mm1_mlx.image.source import DEFAULT_LIMITS as DEFAULT_LIMITS
from mm1_mlx.image.source import Frame as Frame
from mm1_mlx.image.source import ImageSource as ImageSource
from mm1_mlx.image.source import Limits as Limits
from mm1_mlx.image.source import Viewed as Viewed
from mm1_mlx.image.source import name_of as name_of
