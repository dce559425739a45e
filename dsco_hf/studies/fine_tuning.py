"""What a generator is trained from, as options of its recipe: another pipeline, an autoencoder, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import AutoencoderKL

from ..generators.base import FAMILIES
from ..generators.denoisers import GeneratorTrainingConfig, build_denoiser, build_scheduler
from ..generators.prompts import TextConditioned, class_prompts
from ..sampling.hosts import is_host
from ..sampling.models import load_model
from ..sampling.pipeline import DsCoPipeline


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """What a generator is trained from.

    Attributes:
        vae, vae_revision: an `AutoencoderKL` (folder or Hub id) to train in its latents; none for pixel space.
        finetune_from, finetune_revision: a pipeline (folder or Hub id) to train further: its denoiser with new class
            embeddings or prompts, its noise schedule, its autoencoder and its image size (a UNet takes another
            `image_size` too). A learned variance stays as it is, and so do text encoders.
        class_mapping: a YAML file with `dataset class: class of that pipeline`, index or name, or a list of them, for
            classes that should start from others than the mean of all.
        prompts: of a denoiser that is conditioned on them: a template, in which {} stands for the class, or a YAML
            file with several, or with a prompt for each class; "a photo of a {}" if none.
        negative_prompt: what dropped labels become, and guidance leads away from.
        drop_text_encoders: leave the text encoders out of the folder; the encoded prompts are there in any case.
    """

    vae: str | None = None
    vae_revision: str | None = None
    finetune_from: str | None = None
    finetune_revision: str | None = None
    class_mapping: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    drop_text_encoders: bool = False

    @property
    def asked(self) -> dict[str, str]:
        """What is asked of the prompts."""
        given = {"prompts": self.prompts, "negative_prompt": self.negative_prompt}
        return {name: text for name, text in given.items() if text is not None}

    def load_base(self, names: Sequence[str] | None = None) -> DsCoPipeline | None:
        """The pipeline to train further, if one was named; with prompts of the classes `names`, if it takes them.

        Raises:
            ValueError: for options that belong to one, or exclude it.
        """
        if self.finetune_from is None:
            if self.class_mapping is not None:
                raise ValueError("`class_mapping` maps to classes of `finetune_from`, which is missing.")
            return None
        if self.vae is not None:
            raise ValueError("`finetune_from` brings its own autoencoder: leave `vae` out.")
        place, revision, asked = self.finetune_from, self.finetune_revision, self.asked
        if is_host(place, revision):
            return DsCoPipeline.from_pretrained(place, revision=revision, class_names=names, **asked)
        pipe = DsCoPipeline.from_pretrained(place, revision=revision)
        known = pipe.prompts
        if asked or (known is not None and names is not None and list(names) != known.config.class_names):
            negative = {} if known is None else {"negative_prompt": known.config.negative_prompt}
            pipe.encode_prompts(class_names=names, **negative | asked)
        return pipe

    def check_prompts(self, architecture: str, names: Sequence[str]) -> None:
        """Raises ValueError for prompts that a new network of this architecture or these classes cannot have."""
        if issubclass(FAMILIES[architecture], TextConditioned):
            class_prompts(self.prompts, names)
        elif self.asked:
            raise ValueError(
                f"A new {architecture!r} knows its classes by itself and takes no prompts: leave "
                f"{' and '.join(f'`{name}`' for name in self.asked)} out, or choose `architecture='stable-diffusion'`."
            )

    def new_base(
        self, config: GeneratorTrainingConfig, names: Sequence[str], shape: Sequence[int]
    ) -> DsCoPipeline | None:
        """A new pipeline of prompts, for an architecture that is conditioned on them; None for another.

        Args:
            config ([`GeneratorTrainingConfig`]): of network and noise levels.
            names (sequence of `str`): the classes.
            shape (sequence of `int`): channels and height of the images.

        Raises:
            ValueError: for a size that it cannot take, or a family that cannot be built.
        """
        family = FAMILIES[config.architecture]
        if not issubclass(family, TextConditioned):
            return None
        vae, (channels, side) = self.load_vae(), shape
        if vae is not None:
            channels, side = vae.config.latent_channels, side // 2 ** (len(vae.config.block_out_channels) - 1)
        network = build_denoiser(config, num_classes=len(names), sample_size=side, num_channels=channels)
        scheduler = build_scheduler(config, latents=vae is not None)
        encoders = family.build_encoders(config.seed)
        return DsCoPipeline(network, scheduler, vae, class_names=names, **encoders, **self.asked)

    def load_vae(self) -> AutoencoderKL | None:
        """The autoencoder, if one was named."""
        return None if self.vae is None else load_model(AutoencoderKL, self.vae, revision=self.vae_revision)
