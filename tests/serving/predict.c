/* Asks a SavedModel as a server does, through TensorFlow's C API, with no Python.

       predict SAVED_MODEL INPUT OUTPUT NAMES < requests

   INPUT, OUTPUT and NAMES are tensors of a signature, "operation:index": of the images,
   of the probabilities (float32) and of the class names. A request is the line
   "FILE uint8|float32 RANK SIZE..."; the file holds the numbers of one tensor. Each is
   answered with a line for each image, "NAME PROBABILITY...", or with one that begins
   with "error: "; then the next one is read. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tensorflow/c/c_api.h>

static TF_Output find(TF_Graph *graph, char *tensor) {
  char *colon = strrchr(tensor, ':');
  *colon = 0;
  TF_Output output = {TF_GraphOperationByName(graph, tensor), atoi(colon + 1)};
  if (output.oper == NULL) {
    fprintf(stderr, "no operation %s\n", tensor);
    exit(2);
  }
  return output;
}

static TF_Tensor *read_request(void) {
  char path[4096], dtype[16];
  int rank;
  int64_t sizes[8], count = 1;
  if (scanf("%4095s %15s %d", path, dtype, &rank) != 3) return NULL;
  for (int i = 0; i < rank; i++) {
    if (scanf("%ld", &sizes[i]) != 1) return NULL;
    count *= sizes[i];
  }
  TF_DataType type = strcmp(dtype, "uint8") ? TF_FLOAT : TF_UINT8;
  size_t bytes = count * TF_DataTypeSize(type);
  TF_Tensor *tensor = TF_AllocateTensor(type, sizes, rank, bytes);
  FILE *file = fopen(path, "rb");
  if (file == NULL || fread(TF_TensorData(tensor), 1, bytes, file) != bytes) {
    fprintf(stderr, "%s does not have %zu bytes\n", path, bytes);
    exit(2);
  }
  fclose(file);
  return tensor;
}

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  const char *tags[] = {"serve"};
  TF_Status *status = TF_NewStatus();
  TF_Graph *graph = TF_NewGraph();
  TF_SessionOptions *options = TF_NewSessionOptions();
  TF_Session *session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1,
                                                     graph, NULL, status);
  if (TF_GetCode(status) != TF_OK) {
    fprintf(stderr, "%s\n", TF_Message(status));
    return 2;
  }
  TF_Output input = find(graph, argv[2]);
  TF_Output outputs[] = {find(graph, argv[3]), find(graph, argv[4])};
  TF_Tensor *images;
  while ((images = read_request()) != NULL) {
    TF_Tensor *got[2] = {NULL, NULL};
    TF_SessionRun(session, NULL, &input, &images, 1, outputs, got, 2, NULL, 0, NULL,
                  status);
    TF_DeleteTensor(images);
    if (TF_GetCode(status) != TF_OK) {
      char message[1000];
      snprintf(message, sizeof message, "%s", TF_Message(status));
      for (char *c = message; *c; c++)
        if (*c == '\n') *c = ' ';
      printf("error: %s\n", message);
      continue;
    }
    const float *probabilities = TF_TensorData(got[0]);
    const TF_TString *names = TF_TensorData(got[1]);
    int64_t classes = TF_Dim(got[0], 1);
    for (int64_t i = 0; i < TF_Dim(got[0], 0); i++) {
      printf("%.*s", (int)TF_StringGetSize(&names[i]),
             TF_StringGetDataPointer(&names[i]));
      for (int64_t j = 0; j < classes; j++)
        printf(" %.9g", probabilities[i * classes + j]);
      printf("\n");
    }
    TF_DeleteTensor(got[0]);
    TF_DeleteTensor(got[1]);
  }
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
