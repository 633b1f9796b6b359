// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// Service levels for soft-RoCE, which drops those it is given: a queue pair's is kept as a card keeps it, and told to
// whoever asks (ibv_query_qp). It sits between rdma_rxe and the kernel's RDMA core; the rest of the way is the real
// one.
#include <linux/module.h>
#include <linux/xarray.h>
#include <rdma/ib_verbs.h>

static DEFINE_XARRAY(levels);  // by queue pair
static struct ib_device_ops rxe;

static int modify_qp(struct ib_qp *pair, struct ib_qp_attr *attributes, int mask, struct ib_udata *data) {
  const int failed = rxe.modify_qp(pair, attributes, mask, data);
  if (failed || !(mask & IB_QP_AV)) return failed;
  return xa_err(xa_store(&levels, (unsigned long)pair, xa_mk_value(rdma_ah_get_sl(&attributes->ah_attr)), GFP_KERNEL));
}

static int query_qp(struct ib_qp *pair, struct ib_qp_attr *attributes, int mask, struct ib_qp_init_attr *init) {
  const int failed = rxe.query_qp(pair, attributes, mask, init);
  const void *level = xa_load(&levels, (unsigned long)pair);
  if (!failed && level) rdma_ah_set_sl(&attributes->ah_attr, xa_to_value(level));
  return failed;
}

static int destroy_qp(struct ib_qp *pair, struct ib_udata *data) {
  const int failed = rxe.destroy_qp(pair, data);
  if (!failed) xa_erase(&levels, (unsigned long)pair);
  return failed;
}

// Of every device that comes: nobody uses it yet. All devices of a driver have the same calls.
static int add(struct ib_device *device) {
  if (device->ops.driver_id != RDMA_DRIVER_RXE) return -EOPNOTSUPP;
  rxe = device->ops;
  device->ops.modify_qp = modify_qp;
  device->ops.query_qp = query_qp;
  device->ops.destroy_qp = destroy_qp;
  return 0;
}

static struct ib_client client = {.name = "service_levels", .add = add};

static int __init begin(void) { return ib_register_client(&client); }
module_init(begin);  // and no exit: devices keep the calls

MODULE_DESCRIPTION("Service levels for soft-RoCE");
MODULE_LICENSE("GPL");
