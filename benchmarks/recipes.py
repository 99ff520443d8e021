"""What learn.py gives each method at 64 px: its options, where its paper's are for 224 px and large batches.

Everything else is the same for all: backbone, optimiser, schedule, batch, images, steps.
"""

from __future__ import annotations

from typing import Any

from photos import SIZE_PX

TEMPERATURE = 0.2
PROJECTOR = (512, 128)
CROP_AREA = (0.2, 1.0)
JITTER = 0.4  # of brightness, contrast and saturation; a quarter of it is the hue's, as a share of the circle
COLOUR = {"brightness": JITTER, "contrast": JITTER, "saturation": JITTER, "hue_degrees": JITTER / 4 * 360, "blur": 0.0}
VIEWS = {"size_px": SIZE_PX, "crop_area": CROP_AREA, **COLOUR}
ASYMMETRIC = VIEWS | {"second_blur": 0.0, "second_solarize": 0.2}
CROP = {"resize_px": 72, "size_px": SIZE_PX}
LOCAL = {"size_px": 32, "crop_area": [0.05, 0.4], **COLOUR}
MULTI_CROP = {"num_local": 4, "local": LOCAL}

OPTIONS: dict[str, dict[str, Any]] = {
    "simclr": {"temperature": TEMPERATURE, "projector": PROJECTOR, "augment": VIEWS},
    "moco_v2": {"projector": [512, 128], "queue": 8192, "momentum": 0.99, "augment": VIEWS},
    "moco_v3": {"projector": [1024, 256], "predictor": 1024, "temperature": 0.2, "augment": ASYMMETRIC},
    "byol": {"projector": [1024, 256], "predictor": 1024, "momentum": 0.97, "augment": ASYMMETRIC},
    "simsiam": {"projector": [1024, 1024], "predictor": 256, "augment": VIEWS},
    "barlow_twins": {"projector": [1024, 1024], "lr_scale_of_biases": 1.0, "augment": ASYMMETRIC},
    "vicreg": {"projector": [1024, 1024], "augment": ASYMMETRIC},
    "vibcreg": {"projector": [1024, 1024], "augment": ASYMMETRIC},
    "swav": {
        "projector": [512, 128],
        "prototypes": 256,
        "queue": 2048,
        "queue_from_epoch": 3,
        "freeze_prototypes_steps": 31,
        "augment": VIEWS,
        **MULTI_CROP,
    },
    "dino": {
        "hidden": 512,
        "bottleneck": 128,
        "outputs": 1024,
        "momentum": 0.99,
        "warmup_epochs": 3,
        "augment": ASYMMETRIC | {"crop_area": [0.4, 1.0]},
        **MULTI_CROP,
    },
    "deepcluster": {
        "clusters": 500,
        "hidden": [512],
        "components": 128,
        "augment": {"size_px": SIZE_PX, "crop_area": CROP_AREA},
    },
    "deepcluster_v2": {"projector": [512, 128], "clusters": [300, 300, 300], "augment": VIEWS, **MULTI_CROP},
    "rotation": {"augment": CROP},
    "jigsaw": {
        "permutations": 100,
        "tile_px": 18,
        "hidden": 1024,
        "augment": {"resize_px": 76, "size_px": 66},
    },
    "relative_position": {
        "grid": {"patch_px": 20, "gap_px": 6, "jitter_px": 2, "resize_px": [76, 96]},
        "sample_down_pixels": 64,
        "hidden": [1024],
    },
    "corruption": {"augment": CROP},
    "colorization": {"augment": CROP},
    "inpainting": {"augment": CROP},
    "segsort": {"stride": 8, "decoder": [128], "most_segments": 25, "augment": CROP},  # places times prototypes: memory
    "uda": {"num_classes": 10, "augment": CROP, "strong": {"cutout": 0.5}},
    "combined": {
        "parts": {
            "rotation": {"weight": 0.3, "augment": CROP},
            "simclr": {"temperature": TEMPERATURE, "projector": PROJECTOR, "augment": VIEWS},
        }
    },
}
