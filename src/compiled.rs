//! The calls of each type of elements, compiled here, once: a generic function is compiled again in
//! every crate that calls it, and these are large.

use crate::dtype::{bf16, f16};
use crate::error::Result;
use crate::plan::{Candidate, Explanation};
use crate::prepared::{self, Layout, Prepared};
use crate::problem::Operands;
use crate::tensor::{TensorMut, TensorRef};
use crate::train::{Accumulate, Grads, Outputs, Params, Workspace};
use crate::tuning::Tuning;

/// Declares [`Compiled`], and each of its functions as a generic one, for a type.
macro_rules! compiled {
    ($($(#[$attribute:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $generic:expr;)*) => {
        /// What generic calls of [`Prepared`] and [`Params`], and of what is made of them, go through.
        pub(crate) trait Compiled: Sized {
            $($(#[$attribute])* fn $name($($arg: $ty),*) -> Result<$ret>;)*
        }

        macro_rules! compile {
            ($element:ty) => {
                impl Compiled for $element {
                    $($(#[$attribute])* fn $name($($arg: $ty),*) -> Result<$ret> {
                        $generic($($arg),*)
                    })*
                }
            };
        }
        compile!(f32);
        compile!(f16);
        compile!(bf16);
    };
}

compiled! {
    fn run(
        layer: &Prepared<Self>,
        operands: &Operands<'_, Self>,
        dst: &mut TensorMut<'_, Self>,
        scratch: Option<&TensorMut<'_>>
    ) -> () = Prepared::run_on_backend;
    fn run_together(
        layers: &[Prepared<Self>],
        operands: &[Operands<'_, Self>],
        dsts: &mut [TensorMut<'_, Self>]
    ) -> () = prepared::run_together;
    #[cfg(feature = "cuda")]
    fn run_chain(
        layers: &[Prepared<Self>],
        src: &TensorRef<'_, Self>,
        dst: &TensorMut<'_, Self>
    ) -> bool = prepared::run_chain;
    fn explain(layer: &Prepared<Self>, src: &[usize], layout: Layout) -> Explanation
        = Prepared::explain_on_backend;
    fn plans(layer: &Prepared<Self>, src: &[usize], layout: Layout) -> Vec<Candidate>
        = Prepared::plans_on_backend;
    fn tune(layer: &Prepared<Self>, shapes: &[(&[usize], Layout)]) -> Tuning
        = Prepared::tune_on_backend;
    fn run_forward(
        params: &Params,
        operands: &Operands<'_, Self>,
        dst: &mut TensorMut<'_, Self>
    ) -> Workspace = Params::run_forward;
    fn check_backward(
        params: &Params,
        operands: &Operands<'_, Self>,
        workspace: &Workspace,
        d_dst: &TensorRef<'_, Self>,
        outputs: &Outputs<'_, Self>,
        grads: &Grads
    ) -> () = Params::check_backward;
    fn run_backward(
        params: &Params,
        operands: &Operands<'_, Self>,
        workspace: Workspace,
        d_dst: &TensorRef<'_, Self>,
        outputs: &mut Outputs<'_, Self>,
        grads: &mut Grads,
        accumulate: Accumulate
    ) -> () = Params::run_backward;
}
