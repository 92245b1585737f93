//! The threads that serve clients.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

use crate::niceness::GivesWay;

/// Threads that give way to the threads and the processes of builds.
pub(super) struct ServingThreads(Option<Runtime>);

impl ServingThreads {
    /// # Errors
    ///
    /// The threads can't be started.
    pub(super) fn start() -> io::Result<Self> {
        // Some are started by others, so this must not be found out in each.
        let priority = GivesWay::to_this_thread()?;
        let mut threads = Builder::new_multi_thread();
        threads.thread_name("serving").on_thread_start(move || priority.begin()).enable_all();
        Ok(Self(Some(threads.build()?)))
    }

    pub(super) fn handle(&self) -> &Handle {
        self.0.as_ref().expect("it is taken at the end").handle()
    }
}

impl Drop for ServingThreads {
    /// Doesn't wait for work that blocks.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;
    use tokio::task::spawn_blocking;

    use super::*;

    #[tokio::test]
    async fn threads_that_others_of_them_start_give_way_as_much_as_those() {
        let own = getpriority_process(None).unwrap();
        let threads = ServingThreads::start().unwrap();
        let niceness = || getpriority_process(None).unwrap();
        let found = threads.handle().spawn(async move {
            let blocking = spawn_blocking(move || (niceness(), Handle::current().block_on(spawn_blocking(niceness))));
            (niceness(), blocking.await.unwrap())
        });
        let (worker, (blocking, further)) = found.await.unwrap();
        let lower = (own + 10).min(19);
        assert_eq!([worker, blocking, further.unwrap(), niceness()], [lower, lower, lower, own]);
    }
}
