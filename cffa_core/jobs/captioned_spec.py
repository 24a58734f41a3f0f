"""What the captioned model is asked for: its training, and pictures from text or text from pictures (METHODS 7)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cffa_core.jobs.spec_fields import Identifier, Kind, Prompt, Seed, Spec

Width = Annotated[int, Field(ge=8, le=2048, multiple_of=8)]


class CaptionedSizes(Spec):
    """Widths of the model's parts. Pictures are 224 x 224 and their latents 7 x 7, whatever is set here (METHODS 7)."""

    embedding: Width = Field(default=512, description="Numbers that stand for a text or a picture.")
    latent_channels: Width = 256
    unet: tuple[Width, Width, Width] = Field(default=(128, 256, 512), description="Channels of the UNet's levels.")
    image: Width = Field(default=32, description="First of the encoder's five widths, each twice the one before.")
    decoder: Width = Field(default=128, description="First of the picture decoder's four widths, each half as wide.")
    text: Width = Field(default=256, description="Width of the text encoder and of the caption decoder.")
    text_layers: int = Field(default=2, ge=1, le=24)
    max_tokens: int = Field(default=64, ge=4, le=1024, description="Longest text in words and marks, start and end.")

    @model_validator(mode="after")
    def _decoder_can_be_halved(self) -> Self:
        if self.decoder % 64:
            raise ValueError("decoder must be a multiple of 64: it is halved three times, in groups of 8")
        return self


class CaptionedTrainSettings(Spec):
    """All settings of a training of the captioned model, apart from which data set it uses.

    The data set has ``captions.jsonl``; of each pair the image of ``modality`` and its caption are learnt.
    """

    modality: Literal["cf", "fa"] = "cf"
    sizes: CaptionedSizes = CaptionedSizes()
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: Literal["none", "dihedral"] = Field(
        default="dihedral", description="dihedral: flips and quarter turns; none where captions say left or right."
    )
    steps: int = Field(default=4000, ge=1, le=1_000_000)
    batch_size: int = Field(default=32, ge=2, le=1024)
    drawn_per_step: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="So many pictures of each batch go on into picture decoder and UNet, which cost most; null: all.",
    )
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    contrastive_weight: float = Field(default=1.0, ge=0)
    caption_weight: float = Field(default=1.0, ge=0)
    reconstruction_weight: float = Field(default=1.0, ge=0)
    diffusion_weight: float = Field(default=1.0, ge=0)
    condition_dropout: float = Field(default=0.1, ge=0, lt=1, description="Share of pictures without text.")
    holdout: float = Field(default=0.1, ge=0, lt=1, description="Fraction of EYES held out for validation.")
    validate_every: int = Field(default=500, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    seed: Seed = 42


class CaptionedTrainingSpec(CaptionedTrainSettings):
    """A training job of the captioned model."""

    kind: Literal[Kind.CAPTIONED_TRAINING] = Kind.CAPTIONED_TRAINING
    dataset_id: Identifier

    def settings(self) -> CaptionedTrainSettings:
        """What a recipe needs of it: no ids."""
        return CaptionedTrainSettings.model_validate(self.model_dump(include=set(CaptionedTrainSettings.model_fields)))


class CaptionedSettings(Spec):
    """Pictures from texts, or captions of pictures, apart from which model makes them of which data set."""

    task: Literal["text_to_image", "image_to_text"]
    texts: tuple[Prompt, ...] = Field(default=(), max_length=10_000, description="With text_to_image: what is drawn.")
    images_per_text: int = Field(default=1, ge=1, le=1000)
    use_diffusion: bool = Field(default=True, description="False: the text's own embedding is decoded directly.")
    ddim_steps: int = Field(default=50, ge=10, le=100)
    guidance_scale: float = Field(default=2.0, ge=1, le=30)
    captions: int = Field(default=3, ge=1, le=20, description="With image_to_text: captions per picture.")
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.9
    top_k: int = Field(default=50, ge=0, description="0 switches it off.")
    top_p: float = Field(default=0.9, gt=0, le=1)
    repetition_penalty: float = Field(default=1.3, ge=1, le=10)
    max_images: int = Field(default=1000, ge=1, le=100_000, description="Of a larger data set the first are captioned.")
    seed: Seed = 42

    @model_validator(mode="after")
    def _texts_belong_to_one_task(self) -> Self:
        if (self.task == "text_to_image") != bool(self.texts):
            raise ValueError("texts belong to text_to_image, which needs at least one, and to nothing else")
        return self


class CaptionedSpec(CaptionedSettings):
    """A job of the captioned model: draw texts, or caption the images of a data set."""

    kind: Literal[Kind.CAPTIONED] = Kind.CAPTIONED
    model_id: Identifier
    dataset_id: Identifier | None = Field(default=None, description="With image_to_text: whose images.")

    @model_validator(mode="after")
    def _images_come_from_somewhere(self) -> Self:
        if (self.task == "image_to_text") != (self.dataset_id is not None):
            raise ValueError("dataset_id belongs to image_to_text, and to nothing else")
        return self

    def settings(self) -> CaptionedSettings:
        """What a recipe needs of it: no ids."""
        return CaptionedSettings.model_validate(self.model_dump(include=set(CaptionedSettings.model_fields)))
