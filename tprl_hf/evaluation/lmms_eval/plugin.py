"""What lmms-eval finds through its entry point `lmms_eval.models`: the model `tprl`. Light to import."""


def manifest():
    """lmms-eval's `ModelManifest` of [`~tprl_hf.evaluation.lmms_eval.model.TPRL`]."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tprl", chat_class_path="tprl_hf.evaluation.lmms_eval.model.TPRL")
