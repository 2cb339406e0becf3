"""The text of settings follows from the constructor of a hook."""
import pickle

from sn_function import SpectralNormalization
from sn_function._links.printing import settings_text


class More(SpectralNormalization):
    """Has a setting of its own, and passes the others on."""

    def __init__(self, more=1, **settings):
        super().__init__(**settings)
        self.more = more


def test_a_setting_of_a_subclass():
    assert settings_text(More()) == 'n_power_iteration=1'
    assert settings_text(More(more=2, eps=0.5)) == (
        'n_power_iteration=1, eps=0.5, more=2')


def test_the_name_of_a_class_is_its_default():
    class Named(SpectralNormalization):
        name = 'Other'

    assert settings_text(Named()) == 'n_power_iteration=1'
    assert settings_text(Named(name='SpectralNormalization')) == (
        "n_power_iteration=1, name='SpectralNormalization'")


def test_a_hook_of_an_old_pickle():
    """It lacks the settings that there were not."""
    hook = SpectralNormalization(2, factor=3.)
    del hook.cap, hook.n_power_iteration
    hook = pickle.loads(pickle.dumps(hook))
    assert settings_text(hook) == 'n_power_iteration=1, factor=3.0'
