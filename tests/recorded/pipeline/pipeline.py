from dsco_hf import DsCoPipeline as DsCoPipeline
