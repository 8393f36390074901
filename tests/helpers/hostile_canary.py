"""What the hostile pickles of the tests try to call. A call leaves a trace."""

songs = []


def sing(*arguments, **options):
    songs.append("sung")
    return {}


class Singer:
    def __new__(cls, *arguments, **options):
        songs.append("made")
        return super().__new__(cls)

    def __setstate__(self, state):
        songs.append("set")
