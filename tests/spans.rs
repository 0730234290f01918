//! Feature `tracing`: a span per call, with what the call costs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ndarray::{Array2, Array3};
use pointwise::{Branches, Device, Pointwise};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

type Fields = BTreeMap<String, String>;

/// What was told, and what was entered and left.
#[derive(Default)]
struct Watcher {
    watching: AtomicBool,
    spans: Mutex<Vec<Fields>>,
    steps: Mutex<String>,
}

struct Collect<'a>(&'a mut Fields);

impl Visit for Collect<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").trim_matches('"').into());
    }
}

struct Shared(Arc<Watcher>);

impl Subscriber for Shared {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "pointwise" && self.0.watching.load(Ordering::Relaxed)
    }

    fn register_callsite(&self, _: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        tracing::subscriber::Interest::sometimes()
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields::from([("level".into(), span.metadata().level().to_string())]);
        span.record(&mut Collect(&mut fields));
        let mut spans = self.0.spans.lock().unwrap();
        spans.push(fields);
        Id::from_u64(spans.len() as u64)
    }

    fn enter(&self, _: &Id) {
        self.0.steps.lock().unwrap().push('(');
    }

    fn exit(&self, _: &Id) {
        self.0.steps.lock().unwrap().push(')');
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
}

#[test]
fn a_call_is_a_span_with_kernel_and_cost() {
    let watcher = Arc::new(Watcher::default());
    let _guard = tracing::subscriber::set_default(Shared(watcher.clone()));
    let layer = Pointwise::new(Array2::<f32>::ones((16, 8))).relu();
    let layer = layer.prepare(&Device::cpu().threads(1)).unwrap();
    let src = Array3::<f32>::ones((2, 8, 10));
    layer.forward(&src).unwrap();
    assert!(watcher.spans.lock().unwrap().is_empty(), "nobody watched");

    watcher.watching.store(true, Ordering::Relaxed);
    layer.forward(&src).unwrap();
    let expected = layer.explain(&[2, 8, 10]).unwrap();
    let told = watcher.spans.lock().unwrap().clone();
    let [span] = &told[..] else { panic!("not one span: {told:?}") };
    assert_eq!(span["level"], "DEBUG");
    assert_eq!(span["kernel"], expected.kernel);
    assert_eq!(span["problem"], expected.problem);
    assert_eq!(span["macs"], (2 * 10 * 16 * 8).to_string());
    assert_eq!(span["bytes"], expected.cost.bytes().to_string());

    Branches::new(vec![layer.clone(), layer]).unwrap().forward(&src).unwrap();
    assert_eq!(watcher.spans.lock().unwrap().len(), 3);
    assert_eq!(*watcher.steps.lock().unwrap(), "()(())");
}
