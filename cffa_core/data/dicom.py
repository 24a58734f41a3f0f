"""Generated images as DICOM: Ophthalmic Photography 8 Bit Image Storage (PS3.3 A.41), marked as synthetic throughout.

Both images of a pair belong to one made-up patient, one study and one frame of reference, in a series each, so that
viewers link them. UIDs follow from the pair's digest: equal pairs give equal bytes. What a photograph of an eye must
say and a generated one cannot know is empty where the standard allows that, and named in the image comments elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    OphthalmicPhotography8BitImageStorage,
    generate_uid,
)

from cffa_core.data.contracts import Bytes
from cffa_core.errors import CorruptArtifact

PRIVATE_GROUP, PRIVATE_CREATOR, PROVENANCE = 0x0011, "CFFA", 0x01
# Nothing was ever photographed, so there is no time to tell; the standard wants one (type 1).
NO_DATE, NO_TIME = "19700101", "000000"
LATERALITY = "R"
COMMENTS = (
    "Synthetic image, made by a model: no patient, no camera, no contrast agent. Date, time and laterality are "
    "nominal: the standard asks for them, and a generated pair belongs to no eye."
)
_NUMBER = {"cf": 1, "fa": 2}
_IMAGE_TYPE = {"cf": "COLOR", "fa": "FA"}
_TITLE = {"cf": "Synthetic colour fundus photograph", "fa": "Synthetic fluorescein angiograph"}
_DERIVATION_LENGTH = 1024  # of the value representation ST


@dataclass(frozen=True)
class PairIdentity:
    """What both images of a pair share. ``provenance``: the pair's entry of its manifest with the archive's header."""

    index: int
    digest: str
    provenance: Mapping[str, Any]

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> PairIdentity:
        """The identity of a pair by the SHA-256 of its images and its number; ids and clocks have no part in it."""
        images = ":".join(str(provenance[modality]["sha256"]) for modality in ("cf", "fa"))
        index = int(provenance["index"])
        return cls(index, hashlib.sha256(f"{index}:{images}".encode()).hexdigest(), provenance)

    def uid(self, what: str) -> UID:
        """A UID below pydicom's root, made of the digest and the name of what it identifies."""
        return generate_uid(entropy_srcs=["cffa", self.digest, what])


def dicom_file(pixels: Bytes, modality: str, pair: PairIdentity) -> bytes:
    """One image as a DICOM file, explicit VR, not compressed: `cf` ``(H, W, 3)`` RGB or `fa` ``(H, W)`` grey, 8 bits.

    Raises ``CorruptArtifact`` for pixels of another form.
    """
    wanted = 3 if modality == "cf" else 2
    if pixels.dtype != np.uint8 or pixels.ndim != wanted or (wanted == 3 and pixels.shape[2] != 3):
        raise CorruptArtifact(f"{modality} of pair {pair.index} has the form {pixels.shape} {pixels.dtype}")
    dataset = Dataset()
    for part in (_patient_and_study(pair), _series(modality, pair), _image(pixels, modality, pair), _ophthalmic()):
        dataset.update(part)
    instance = pair.uid(f"{modality} image")
    dataset.SOPClassUID = OphthalmicPhotography8BitImageStorage
    dataset.SOPInstanceUID = instance
    block = dataset.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    block.add_new(PROVENANCE, "UT", json.dumps(pair.provenance, sort_keys=True))
    dataset.file_meta = _file_meta(instance)
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _file_meta(instance: UID) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = OphthalmicPhotography8BitImageStorage
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # Said here, or the version of the library would be in the bytes.
    meta.ImplementationClassUID = generate_uid(entropy_srcs=["cffa", "implementation"])
    meta.ImplementationVersionName = "CFFA"
    return meta


def _patient_and_study(pair: PairIdentity) -> Dataset:
    """Modules Patient, General Study and Frame of Reference, alike in both images."""
    part = Dataset()
    part.SpecificCharacterSet = "ISO_IR 192"
    part.PatientName = f"Synthetic^Pair {pair.index:06d}"
    part.PatientID = f"CFFA-{pair.digest[:16]}"
    part.PatientBirthDate = ""
    part.PatientSex = ""
    part.PatientIdentityRemoved = "YES"
    part.DeidentificationMethod = "There is no patient: the image was made by a model"
    part.StudyInstanceUID = pair.uid("study")
    part.StudyDate = ""
    part.StudyTime = ""
    part.ReferringPhysicianName = ""
    part.StudyID = ""
    part.AccessionNumber = ""
    part.StudyDescription = "Synthetic pair of fundus photograph and angiograph"
    part.FrameOfReferenceUID = pair.uid("frame of reference")
    part.PositionReferenceIndicator = ""
    part.SynchronizationFrameOfReferenceUID = pair.uid("synchronization")
    part.SynchronizationTrigger = "NO TRIGGER"
    part.AcquisitionTimeSynchronized = "N"
    return part


def _series(modality: str, pair: PairIdentity) -> Dataset:
    """Modules Ophthalmic Photography Series and General Equipment."""
    part = Dataset()
    part.Modality = "OP"
    part.SeriesInstanceUID = pair.uid(f"{modality} series")
    part.SeriesNumber = _NUMBER[modality]
    part.SeriesDescription = _TITLE[modality]
    part.Manufacturer = "CFFA"
    part.ManufacturerModelName = "CFFA"
    versions = pair.provenance.get("versions")
    if isinstance(versions, Mapping) and versions:
        part.SoftwareVersions = [f"{name} {version}"[:64] for name, version in sorted(versions.items())]
    return part


def _image(pixels: Bytes, modality: str, pair: PairIdentity) -> Dataset:
    """Modules General Image, Image Pixel, Multi-frame, Ophthalmic Photography Image, SOP Common."""
    part = Dataset()
    part.SyntheticData = "YES"
    part.ImageType = ["DERIVED", "PRIMARY", "SYNTHETIC", _IMAGE_TYPE[modality]]
    part.InstanceNumber = 1
    part.PatientOrientation = ""
    part.ContentDate = NO_DATE
    part.ContentTime = NO_TIME
    part.SourceImageSequence = Sequence()
    part.DerivationDescription = _derivation(pair)
    part.ImageComments = COMMENTS
    part.BurnedInAnnotation = "NO"
    part.RecognizableVisualFeatures = "NO"
    part.LossyImageCompression = "00"
    part.NumberOfFrames = 1
    part.FrameIncrementPointer = Tag("FrameTime")
    part.FrameTime = 0
    part.SamplesPerPixel = 3 if modality == "cf" else 1
    part.PhotometricInterpretation = "RGB" if modality == "cf" else "MONOCHROME2"
    if modality == "cf":
        part.PlanarConfiguration = 0
    else:
        part.PresentationLUTShape = "IDENTITY"
    part.Rows, part.Columns = pixels.shape[:2]
    part.BitsAllocated = 8
    part.BitsStored = 8
    part.HighBit = 7
    part.PixelRepresentation = 0
    data = np.ascontiguousarray(pixels).tobytes()
    part.PixelData = data + b"\x00" * (len(data) % 2)
    part["PixelData"].VR = "OB"
    return part


def _ophthalmic() -> Dataset:
    """Modules Ocular Region Imaged, Ophthalmic Photography Acquisition Parameters, Ophthalmic Photographic Parameters.

    The acquisition device is a computer: a fundus camera would have to tell its pixel spacing (type 1C), and there is
    none. What it left empty is of type 2.
    """
    part = Dataset()
    part.ImageLaterality = LATERALITY
    part.AnatomicRegionSequence = _coded("5665001", "SCT", "Retina")
    part.PatientEyeMovementCommanded = ""
    part.RefractiveStateSequence = Sequence()
    part.EmmetropicMagnification = None
    part.IntraOcularPressure = None
    part.HorizontalFieldOfView = None
    part.PupilDilated = ""
    part.AcquisitionDeviceTypeCodeSequence = _coded("COMP", "DCM", "Computation Server")
    part.IlluminationTypeCodeSequence = Sequence()
    part.LightPathFilterTypeStackCodeSequence = Sequence()
    part.ImagePathFilterTypeStackCodeSequence = Sequence()
    part.LensesCodeSequence = Sequence()
    part.DetectorType = ""
    return part


def _coded(value: str, scheme: str, meaning: str) -> Sequence:
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return Sequence([item])


def _derivation(pair: PairIdentity) -> str:
    """Where the image comes from, for people; all of it is in the private element, as JSON."""
    known = pair.provenance
    said = [f"Synthetic, generated by CFFA: pair {pair.index}"]
    said += [f"{name} {known[name]}" for name in ("seed", "try", "model_digest", "dataset_digest") if name in known]
    return ", ".join(said)[:_DERIVATION_LENGTH]
