"""Options by name, in sections: ml_collections' ConfigDict, or what stands in for it."""

from maskdit_jax.errors import known

try:
    from ml_collections import ConfigDict
except ModuleNotFoundError:

    class ConfigDict(dict):  # type: ignore[no-redef]
        """The part of ml_collections' ConfigDict that configs use, so that the benchmark runs without it."""

        _locked = False

        def __init__(self, values=()):
            super().__init__()
            self.update(**dict(values))

        def __getattr__(self, name):
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

        def __setattr__(self, name, value):
            if self._locked and name not in self:
                raise AttributeError(f"{name!r} is unknown; known: {known(name, self)}")
            self[name] = ConfigDict(value) if type(value) is dict else value

        def update(self, **values):
            for name, value in values.items():
                setattr(self, name, value)

        def lock(self):
            for section in self.values():
                if isinstance(section, ConfigDict):
                    section.lock()
            vars(self)["_locked"] = True
            return self

        def to_dict(self):
            return {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in self.items()}
