import os
import socket

import pytest
import torch.multiprocessing as mp
from accelerate import PartialState

from dsco_hf.utils.configs import make_accelerator
from dsco_hf.utils.processes import RunError, Team
from launches import METHOD


def fail():
    raise KeyError("gone")


def test_alone():
    with Team(make_accelerator()) as team:
        assert (team.rank, team.world) == (0, 1)
        assert team.gather("a") == ["a"] and team.everywhere(lambda: 3, "counting") == [3]
        assert team.from_main(lambda: {"x": 1}, "reading") == {"x": 1}
        with pytest.raises(KeyError, match="gone"):
            team.from_main(fail, "reading")


def together(rank, port):
    """In each of two processes: what one does reaches both, and so does its error."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    with Team(PartialState(cpu=True)) as team:
        assert team.world == 2 and team.gather(rank) == [0, 1]
        assert team.from_main(lambda: "from the main one", "reading") == "from the main one"
        try:
            team.everywhere(fail if rank == 1 else list, "looking for it")
        except KeyError:
            assert rank == 1  # its own error
        except RunError as error:
            assert rank == 0 and str(error) == "Failed while looking for it, process 1: KeyError: 'gone'"
        else:
            raise AssertionError("the error did not arrive")
        assert team.gather(rank) == [0, 1]  # and all can go on


@pytest.mark.slow
def test_two_processes_learn_of_one_anothers_errors():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.start_processes(together, args=(port,), nprocs=2, start_method=METHOD)
