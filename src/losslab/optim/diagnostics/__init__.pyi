from .phases import PHASES as PHASES
from .phases import Phase as Phase
from .phases import phase as phase
from .recorder import TALTDiagnostics as TALTDiagnostics
from .sample import LEVELS as LEVELS
from .sample import PAGES as PAGES
from .sample import TALTSample as TALTSample
