//! Whether a build that ran once more has made the same as before.

use cofferdam_castore::{Node, Store};
use serde_json::{Value, json};

use super::failure::{Failure, FailureKind};
use crate::{
    outputs::{Difference, Differences},
    request::{RelativePath, node_text},
};

/// Most outputs of which a failure names the nodes.
const MAX_NAMED: usize = 10;

/// Compares outputs, each list in the order of their paths.
///
/// # Errors
///
/// The failure `not_reproducible` tells how they differ. Or the store fails.
pub(crate) async fn compare(
    store: &Store,
    paths: &[RelativePath],
    earlier: &[Node],
    later: &[Node],
) -> Result<(), Failure> {
    let mut differences = Differences::default();
    let mut outputs = Vec::new();
    for ((path, earlier), later) in
        paths.iter().zip(earlier).zip(later).filter(|((_, earlier), later)| earlier != later)
    {
        let added = differences.add(store, path.as_str(), earlier, later).await;
        added.map_err(|error| Failure::executor_because("store", "the outputs can't be compared", &error))?;
        if outputs.len() < MAX_NAMED {
            let [earlier, later] = [earlier, later].map(node_text::format);
            outputs.push(json!({ "path": path.as_str(), "earlier": earlier, "later": later }));
        }
    }
    let paths = match differences.count() {
        0 => return Ok(()),
        1 => "1 path differs".to_owned(),
        count => format!("{count} paths differ"),
    };
    let mut failure = Failure {
        kind: FailureKind::BuildFailed,
        ..Failure::executor("not_reproducible", format!("the build has made other outputs than before: {paths}"))
    };
    failure.fields.insert("differences".to_owned(), json!(differences.described));
    failure.fields.insert("more_differences".to_owned(), differences.more.into());
    failure.fields.insert("outputs".to_owned(), Value::Array(outputs));
    Err(failure)
}

/// A difference among the fields of a failure, as lines for people: the path and how it differs, then the lines that changed.
pub(crate) fn lines(difference: &Value) -> Option<Vec<String>> {
    let Difference { path, what, lines } = serde_json::from_value(difference.clone()).ok()?;
    Some([format!("{path}: {what}")].into_iter().chain(lines).collect())
}
