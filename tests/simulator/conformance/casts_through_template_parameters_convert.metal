// A cast to a template's type parameter converts, whatever the parameter is
template <typename T, typename U>
T construct(U x) {
  return T(x);
}
template <typename T, typename U>
T c_cast(U x) {
  return (T)x;
}
// body
uint i = thread_position_in_grid.x;
int4 v = construct<int4>(float4(a[i], -a[i], 2.5f, b[i]));
half4 h = c_cast<half4>(v);
for (int k = 0; k < 4; k++) out[4 * i + k] = v[k] + 100 * int(h[k]) + construct<int>(a[i]);
