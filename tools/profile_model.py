"""Count what timm models cost: parameters, multiply-adds with and without the scan, activations. Nothing is computed.

python tools/profile_model.py --models '[vim_tiny, vim_small, deit_small_patch16_224, resnet50]'
python tools/profile_model.py --models '[vim_tiny, deit_tiny_patch16_224]' --img_size 1248
python tools/profile_model.py --models '[vim_small]' --kwargs.mixer bimamba2 --kwargs.d_state 64

GMAC counts linear layers, convolutions and attention; "with the scan" adds the scan, `ssd` and `long_conv`.
"""

import vim  # noqa: F401  (registers the vim_* models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.experiments.profile import ProfileConfig, profile, profile_table


def main() -> None:
    config, _ = ConfigParser(ProfileConfig, __doc__).parse_config()
    with plain_errors():
        rows = profile(config)
    terminal = plain_console().is_terminal
    plain_console(width=None if terminal else 120).print(profile_table(rows))
    print(f"written to {config.output}")


if __name__ == "__main__":
    main()
