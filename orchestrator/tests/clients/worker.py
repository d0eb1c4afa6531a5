"""A scheduler and a worker with the plugin, in one process; ends when the plugin has closed the worker."""
import asyncio
import importlib.util
import os

from distributed import Scheduler, Worker

# The package's own __init__ wants the cloud's SDK, which the plugin does not.
path = os.path.join(os.environ["PLACE"], "dask_cloudprovider/azure/utils.py")
spec = importlib.util.spec_from_file_location("plugin", path)
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)


async def main():
    async with Scheduler(port=0, dashboard_address=None, host="127.0.0.1") as scheduler:
        worker = await Worker(scheduler.address, dashboard_address=None, nthreads=1)
        watch = plugin.AzurePreemptibleWorkerPlugin(termination_events=["Freeze"])
        await worker.plugin_add(watch, name="watch")
        while watch.not_before is None and not watch.terminating:
            await asyncio.sleep(0.1)
        print("announced for", watch.not_before, flush=True)
        await asyncio.wait_for(worker.finished(), 60)
        print("closed gracefully" if watch.terminating else "closed by something else")


asyncio.run(main())
